"""Where a posterior has its mass: climbs, maxima, Gaussians and particles."""
