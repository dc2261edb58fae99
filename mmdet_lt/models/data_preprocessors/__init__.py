"""Work on whole batches between the data loader and the network."""
