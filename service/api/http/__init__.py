"""What all endpoints share: keys, hosts, limits, errors, JSON bodies and their fields."""
