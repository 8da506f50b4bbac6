// Runs before the first paint, so that the page does not flash in the other theme.
try {
  const theme = localStorage.getItem("quantserve.theme");
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
} catch {
  // storage is off: the system's theme
}
