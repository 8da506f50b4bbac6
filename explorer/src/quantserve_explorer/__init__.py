"""The web page of `quantserve serve`; docs/explorer.md describes it."""
