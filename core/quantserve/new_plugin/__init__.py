"""A complete distribution for a new plugin or command, from templates: `quantserve new-plugin`."""

from quantserve.new_plugin.problems import check, note, spelling
from quantserve.new_plugin.project import GROUP_SIZES, KINDS, WIDTHS, Project

__all__ = ["GROUP_SIZES", "KINDS", "WIDTHS", "Project", "check", "note", "spelling"]
