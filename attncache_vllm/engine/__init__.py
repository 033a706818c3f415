# SPDX-License-Identifier: Apache-2.0
"""Everything that touches vLLM. The seams themselves are in :mod:`.compat` and nowhere else."""
