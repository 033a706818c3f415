# SPDX-License-Identifier: Apache-2.0
"""Tenants: what a salt becomes, which other servers and stores on disk must agree about."""

from __future__ import annotations

import re

from attncache_vllm.tenants import SHARED_TENANT, tenant_of


def test_without_a_salt_a_request_is_of_the_shared_tenant() -> None:
    assert tenant_of(None) == tenant_of("") == SHARED_TENANT


def test_each_salt_is_a_tenant_of_its_own() -> None:
    salts = ["a", "A", "a ", "\u00e9", "e\u0301", "\ud800", "\ud801", "x" * 1024]
    tenants = {tenant_of(salt) for salt in salts}
    assert len(tenants - {SHARED_TENANT}) == len(salts)
    assert all(re.fullmatch("[0-9a-f]{32}", tenant) for tenant in tenants)


def test_a_tenant_is_what_it_was_when_its_entries_were_stored() -> None:
    assert tenant_of("a") == "ca978112ca1bbdcafac231b39a23dc4d"
