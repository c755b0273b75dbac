"""What a model's latent sites are: their supports, coordinates and priors."""
