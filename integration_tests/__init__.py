# SPDX-License-Identifier: Apache-2.0
"""Tests against real engines and servers, in processes of their own, with a real model.

A start costs tens of seconds: engines and stores are shared by fixtures, one engine at a time.
"""
