"""Link and higher-order prediction."""
