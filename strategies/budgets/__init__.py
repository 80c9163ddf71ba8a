"""Budget allocators."""
