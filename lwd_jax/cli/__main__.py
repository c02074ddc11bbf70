import sys

from lwd_jax.cli import main

sys.exit(main())
