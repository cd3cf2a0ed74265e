"""Ways to train or change a network beyond plain backprop."""
