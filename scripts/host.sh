#!/usr/bin/env bash
# What the demo and the tests need from Debian, installed without side effects, and taken back exactly.
#
#   scripts/host.sh install demo|test|vm    install what is missing
#   scripts/host.sh missing demo|test|vm    print the packages that would be installed
#   scripts/host.sh packages demo|test|vm   print the packages of a scope, missing or not
#   scripts/host.sh clean                   remove what `install` has installed, and nothing else
#
# The tests need what the demo needs and more; `vm` is what builds and runs a virtual machine for them.
#
# Promises, each of them tested in tests/host:
# - nothing is upgraded, replaced or removed; a Docker Engine from elsewhere counts as the engine that is needed;
# - no service is started, now or at the next boot, and nothing touches the firewall: maintainer scripts run under a
#   policy that forbids starting services. It lasts for the installation only, and a policy that the machine already
#   has is left in place;
# - what was installed is written to a state file before anything else happens, so that `clean` can undo it even after
#   a crash. `clean` leaves a package alone that something else has come to need, or that somebody has come to use.
set -euo pipefail

readonly STATE_DIR=${CRI_DISPATCHER_HOST_STATE:-/var/lib/cri-dispatcher-host}
readonly PACKAGES=$STATE_DIR/packages ACCOUNTS=$STATE_DIR/accounts
readonly POLICY=/usr/sbin/policy-rc.d
readonly POLICY_MARK='# cri-dispatcher: temporary, see scripts/host.sh'
export DEBIAN_FRONTEND=noninteractive NEEDRESTART_SUSPEND=1 APT_LISTCHANGES_FRONTEND=none LC_ALL=C

# One need a line: for whom, how it is recognised, the package that brings it.
readonly NEEDS='
demo command ip              iproute2
demo command iptables        iptables
demo command mount           mount
demo command ps              procps
demo command gcc             gcc
demo package libc6-dev       libc6-dev
demo file    /usr/lib/cni/bridge containernetworking-plugins
demo command dockerd         docker.io
demo command docker-registry docker-registry
demo command busybox         busybox
test command skopeo          skopeo
test command mkfs.erofs      erofs-utils
test command nft             nftables
test command nginx           nginx-light
test command openssl         openssl
test command qemu-system-x86_64 qemu-system-x86
test command mke2fs          e2fsprogs
vm   command mmdebstrap      mmdebstrap
vm   command qemu-system-x86_64 qemu-system-x86
vm   command mke2fs          e2fsprogs
'

say() { printf 'host: %s\n' "$*" >&2; }
fail() { say "$*"; exit 1; }

packages() { # every package of this architecture that is installed, even half
  local native; native=$(dpkg --print-architecture)
  dpkg-query -W -f '${db:Status-Status} ${Architecture} ${Package}\n' |
    awk -v native="$native" '$1 != "not-installed" && $1 != "config-files" && ($2 == native || $2 == "all") { print $3 }' | sort -u
}

# No `grep -q` behind a pipe: it leaves early, and with pipefail the writer's SIGPIPE would count as "not found".
is_installed() { packages | grep -xF -- "$1" >/dev/null; }

needs_of() { # SCOPE: its lines of NEEDS
  local scope rest
  while read -r scope rest; do
    case "$1 $scope" in "demo demo" | "test demo" | "test test" | "vm vm") echo "$scope $rest" ;; esac
  done <<<"$NEEDS"
}

missing_for() { # SCOPE
  local scope kind what package
  needs_of "$1" | while read -r scope kind what package; do
    case $kind in
      command) PATH=$PATH:/usr/local/sbin:/usr/local/bin:/usr/sbin:/sbin command -v "$what" >/dev/null || echo "$package" ;;
      file) [ -e "$what" ] || echo "$package" ;;
      package) is_installed "$what" || echo "$package" ;;
    esac
  done | sort -u
}

accounts() { { sed 's/^\([^:]*\):.*/user \1/' /etc/passwd; sed 's/^\([^:]*\):.*/group \1/' /etc/group; } | sort; }

record() { # FILE LINES: add lines that are not there yet
  [ -n "$2" ] || return 0
  mkdir -p "$STATE_DIR"
  { [ ! -e "$1" ] || cat "$1"; printf '%s\n' "$2"; } | sort -u >"$1.new"
  mv "$1.new" "$1"
}

drop_policy() { # remove our policy, also one that a killed run has left behind
  if [ -f "$POLICY" ] && grep -qxF "$POLICY_MARK" "$POLICY"; then rm -f "$POLICY"; fi
}

policy_denies() { # does the machine's own policy forbid what our packages would start?
  local unit answer
  for unit in docker containerd docker-registry; do
    answer=0; "$POLICY" "$unit" start </dev/null >/dev/null 2>&1 || answer=$?
    [ "$answer" = 101 ] || return 1
  done
}

quiet_apt() { # apt-get under a policy that starts nothing; its status
  local apt=(apt-get -q -y -o DPkg::Lock::Timeout=600 -o Dpkg::Options::=--force-confold -o Dpkg::Use-Pty=0 "$@")
  local status=0
  drop_policy
  if [ ! -e "$POLICY" ]; then
    trap drop_policy EXIT
    trap 'exit 130' INT TERM HUP
    printf '#!/bin/sh\n%s\nexit 101\n' "$POLICY_MARK" >"$POLICY.new"
    chmod 0755 "$POLICY.new"
    mv "$POLICY.new" "$POLICY"
    "${apt[@]}" </dev/null || status=$?
    drop_policy
    trap - EXIT INT TERM HUP
  elif policy_denies; then
    "${apt[@]}" </dev/null || status=$?
  else
    # The machine's own policy would let services start. Ours covers it in a mount namespace that apt-get alone sees.
    local ours; ours=$(mktemp)
    printf '#!/bin/sh\nexit 101\n' >"$ours"
    chmod 0755 "$ours"
    unshare --mount --propagation private -- \
      sh -c 'mount --bind "$1" "$2" && shift 2 && exec "$@"' sh "$ours" "$POLICY" "${apt[@]}" </dev/null || status=$?
    rm -f "$ours"
  fi
  return $status
}

disable_services() { # PACKAGE...: what came with our packages does not start at the next boot either
  local package file name
  for package in "$@"; do
    while read -r file; do
      name=${file##*/}
      case $file in
        */systemd/system/*@*) ;;
        */systemd/system/*.service | */systemd/system/*.socket | */systemd/system/*.timer)
          find /etc/systemd/system -type l -path '*.wants/*' -name "$name" -delete ;;
        /etc/init.d/*) update-rc.d "$name" disable >/dev/null 2>&1 </dev/null || true ;;
      esac
    done < <(dpkg -L "$package")
  done
  if [ -d /run/systemd/system ]; then systemctl daemon-reload </dev/null || true; fi
}

install_for() { # SCOPE
  local wanted before people new
  mapfile -t wanted < <(missing_for "$1")
  if [ ${#wanted[@]} = 0 ]; then say "nothing is missing for the $1"; return; fi
  [ "$(id -u)" = 0 ] || fail "missing: ${wanted[*]}; run as root to install them"
  command -v apt-get >/dev/null || fail "missing: ${wanted[*]}; this machine has no apt-get, install them by hand"
  say "installing: ${wanted[*]}"
  local choice=(--no-install-recommends --no-remove --no-upgrade "${wanted[@]}") plan
  if ! plan=$(apt-get -s install "${choice[@]}" 2>&1 </dev/null); then
    apt-get -q update </dev/null >/dev/null || fail "the package lists cannot be read"
    plan=$(apt-get -s install "${choice[@]}" 2>&1 </dev/null) || fail "apt-get refuses: $(tail -n 5 <<<"$plan")"
  fi
  before=$(packages); people=$(accounts)
  new=$(comm -13 <(printf '%s\n' "$before") <(sed -n 's/^Inst \([^ :]*\) .*/\1/p' <<<"$plan" | sort -u))
  record "$PACKAGES" "$new"
  local status=0
  (quiet_apt install "${choice[@]}") >/tmp/host-apt.$$ 2>&1 || status=$?
  record "$ACCOUNTS" "$(comm -13 <(printf '%s\n' "$people") <(accounts))"
  if [ "$status" != 0 ]; then
    tail -n 20 /tmp/host-apt.$$ >&2; rm -f /tmp/host-apt.$$
    fail "apt-get did not install everything (status $status); 'make clean-host' removes what came in"
  fi
  rm -f /tmp/host-apt.$$
  # shellcheck disable=SC2086  # one package a line
  disable_services $new
  say "installed $(wc -w <<<"$new") packages; 'make clean-host' removes them again"
}

is_used() { # PACKAGE: has somebody come to use it for something of their own?
  local folder=
  case $1 in
    docker.io) folder=/var/lib/docker ;;
    containerd) folder=/var/lib/containerd ;;
    docker-registry) folder=/var/lib/docker-registry ;;
  esac
  if [ -n "$folder" ] && [ -d "$folder" ] && [ -n "$(ls -A "$folder")" ]; then
    say "keeping $1: $folder holds data"; return 0
  fi
  local file exe
  for file in $(dpkg -L "$1" 2>/dev/null | grep -E '^/usr/s?bin/'); do
    for exe in $(find /proc/[0-9]*/exe -maxdepth 0 -lname "$file" 2>/dev/null); do
      # The same file, not only the same name: containers have programs of that name, too.
      if [ "$exe" -ef "$file" ]; then say "keeping $1: $file is running"; return 0; fi
    done
  done
  return 1
}

removal_of() { apt-get -s -o Debug::NoLocking=1 purge "$@" 2>/dev/null </dev/null | sed -n 's/^\(Remv\|Purg\) \([^ ]*\).*/\2/p'; }

clean() {
  drop_policy
  if [ ! -e "$PACKAGES" ]; then say "nothing was installed by us"; rm -rf "$STATE_DIR"; return; fi
  [ "$(id -u)" = 0 ] || fail "run as root"
  local package keep=() remove=() others again=1
  while read -r package; do
    is_installed "$package" || continue
    if is_used "$package"; then keep+=("$package"); else remove+=("$package"); fi
  done <"$PACKAGES"
  # Whatever stands outside our list and would go along keeps the packages that it stands on.
  while [ $again = 1 ] && [ ${#remove[@]} -gt 0 ]; do
    again=0
    others=$(comm -23 <(removal_of "${remove[@]}" | sort -u) <(printf '%s\n' "${remove[@]}" | sort -u))
    [ -n "$others" ] || break
    local rest=()
    for package in "${remove[@]}"; do
      if comm -12 <(removal_of "$package" | sort -u) <(printf '%s\n' "$others") | grep . >/dev/null; then
        keep+=("$package"); again=1
      else
        rest+=("$package")
      fi
    done
    remove=(${rest[@]+"${rest[@]}"})
  done
  if [ ${#remove[@]} -gt 0 ]; then
    quiet_apt purge "${remove[@]}" >/tmp/host-apt.$$ 2>&1 || { tail -n 20 /tmp/host-apt.$$ >&2; rm -f /tmp/host-apt.$$; fail "apt-get purge failed"; }
    rm -f /tmp/host-apt.$$
  fi
  say "removed ${#remove[@]} packages"
  if [ ${#keep[@]} -gt 0 ]; then
    printf '%s\n' "${keep[@]}" | sort -u >"$PACKAGES"
    say "${#keep[@]} packages stay, because they are used or others need them: ${keep[*]}"
    say "they are still on record; run this again when they are free"
    return
  fi
  local kind name
  if [ -e "$ACCOUNTS" ]; then
    while read -r kind name; do
      if [ "$kind" = user ] && getent passwd "$name" >/dev/null; then userdel "$name" 2>/dev/null || true; fi
    done <"$ACCOUNTS"
    while read -r kind name; do
      if [ "$kind" = group ] && getent group "$name" | grep ':$' >/dev/null; then groupdel "$name" 2>/dev/null || true; fi
    done <"$ACCOUNTS"
  fi
  rm -rf "$STATE_DIR"
}

case "${1:-} ${2:-}" in
  "install demo" | "install test" | "install vm") install_for "$2" ;;
  "missing demo" | "missing test" | "missing vm") missing_for "$2" ;;
  "packages demo" | "packages test" | "packages vm") needs_of "$2" | awk '{ print $4 }' | sort -u ;;
  "clean ") clean ;;
  *) fail "usage: scripts/host.sh install|missing|packages demo|test|vm, or clean" ;;
esac
