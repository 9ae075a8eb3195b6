"""Where the time goes: measurements, their tables, and the report page."""
