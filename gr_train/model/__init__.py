"""Models: token inputs, HSTU and its softmax twin, heads, and the recommender that joins them."""
