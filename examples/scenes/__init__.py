"""Three tasks on a procedural room: segmentation, depth and surface normals."""
