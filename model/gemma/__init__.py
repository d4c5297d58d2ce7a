"""The mathematics of Gemma 1, 2 and 3: pure functions, and the Keras model around them."""
