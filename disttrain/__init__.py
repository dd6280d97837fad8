"""disttrain: data-parallel training with the same result on any number of workers."""
