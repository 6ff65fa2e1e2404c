"""A year of flights, published to the embedded broker and loaded into an analytical table by two worker processes."""
