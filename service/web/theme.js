// Sets the chosen colours before anything is drawn; without a choice the system's hold.
try {
  const chosen = localStorage.getItem("quire.theme");
  if (chosen) document.documentElement.dataset.theme = chosen;
} catch {
  // A browser that keeps nothing has no choice to remember.
}
