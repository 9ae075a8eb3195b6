"""A cascade as plain data: export, translation to operations, fusion, the plan and its files."""
