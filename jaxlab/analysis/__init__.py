"""What a network computes and how it scales."""
