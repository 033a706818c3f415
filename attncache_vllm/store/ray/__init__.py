# SPDX-License-Identifier: Apache-2.0
"""A map store for a fleet of servers: shards of entries, each an actor of a Ray cluster."""
