"""Good plugins with one small defect each, which the conformance kit must catch."""
