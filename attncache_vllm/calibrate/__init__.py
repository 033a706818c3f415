# SPDX-License-Identifier: Apache-2.0
"""Offline work: recording maps and fitting the projector that predicts how alike they are."""
