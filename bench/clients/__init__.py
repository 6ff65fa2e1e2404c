"""Which client of a broker is the fastest: batched loops written by hand over each of them."""
