"""Programs that measure every speed claim of the project, beside comparable libraries."""
