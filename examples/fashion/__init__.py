"""MultiFashion: which two garments overlap in one picture, two tasks on one small residual network."""
