# SPDX-License-Identifier: Apache-2.0
"""Offline work: fitting the projector that predicts how alike two sequences' maps are."""
