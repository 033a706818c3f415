# SPDX-License-Identifier: Apache-2.0
"""Scripts behind every published figure, and the model and texts they run on."""
