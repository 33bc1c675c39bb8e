"""What the scripts beside this folder share: images, diffusion, the U-Net with its base, adapters and pictures."""
