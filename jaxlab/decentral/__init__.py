"""Many learners: federated, gossip, disrupted."""
