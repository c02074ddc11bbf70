"""Figures of merit that need no network: spectra, PSNR, SSIM."""
