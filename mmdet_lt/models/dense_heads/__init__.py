"""Dense and DETR heads whose training and test scores follow the loss."""
