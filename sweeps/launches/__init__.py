"""WHO HAS IT: claims, launches and what is in flight. Reads files; asks no scheduler."""
