// Sets the chosen theme before the first paint; the default is the system's.
try {
  const chosen = localStorage.getItem("quire.theme");
  if (chosen) document.documentElement.dataset.theme = chosen;
} catch {
  // A browser without storage uses the default.
}
