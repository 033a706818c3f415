# SPDX-License-Identifier: Apache-2.0
"""The errors this package raises on purpose; everything else is a bug."""


class AttnCacheError(Exception):
    """Base of every error raised on purpose."""


class SettingsError(AttnCacheError):
    """A setting is unknown, malformed or contradicts another one."""


class StoreError(AttnCacheError):
    """A store cannot do what was asked of it."""


class StoreInUse(StoreError):
    """Another process writes to a store that has one writer."""


class StoreDamaged(StoreError):
    """Bytes of a store are not the bytes that were written."""


class StoreTimeout(StoreError):
    """A store did not answer before its deadline."""


class NamespaceMismatch(StoreError):
    """The store's maps were made by a different model or configuration."""
