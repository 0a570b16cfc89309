#!/usr/bin/env python3
"""A pod on this machine; python launch/local_pod.py --help."""

import sys

from jaxlm.recipes.pod import main

if __name__ == "__main__":
    sys.exit(main())
