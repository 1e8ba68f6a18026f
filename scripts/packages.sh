# Installs the Debian packages that are missing. Sourced by scripts/bench, demo and test; changes nothing, and needs
# no root, where everything is there.
#
# Packages come from the sources that this machine's apt is set up with. Where those have no QEMU 10, the backports
# suite is added beside the Debian suite that they name, on the same mirror.

PATH="$PATH:/usr/sbin:/sbin:$HOME/.cargo/bin"
oldest_qemu=10
missing=()

# need PROGRAM-OR-FILE PACKAGE...: notes the packages as missing if that is not there.
need() {
    local what=$1
    shift
    case $what in
    /*) [ -e "$what" ] || missing+=("$@") ;;
    *) command -v "$what" >/dev/null || missing+=("$@") ;;
    esac
}

need_qemu() {
    local version
    version=$({ qemu-system-riscv64 --version 2>/dev/null || true; } |
        sed -n 's/^QEMU emulator version \([0-9]*\).*/\1/p')
    [ "${version:-0}" -ge "$oldest_qemu" ] || missing+=(qemu-system-riscv)
}

say() {
    printf '%s\n' "$*" >&2
}

# quietly COMMAND...: shows what it says only if it fails.
quietly() {
    local words
    words=$("$@" 2>&1 </dev/null) || {
        printf '%s\n' "$words" >&2
        say "error: $* failed"
        exit 1
    }
}

apt() {
    quietly env DEBIAN_FRONTEND=noninteractive apt-get -qq -y -o DPkg::Lock::Timeout=300 -o Acquire::Retries=3 "$@"
}

# The newest version of a package that apt could install, from any suite, is QEMU's oldest or newer.
qemu_is_offered() {
    apt-cache madison qemu-system-riscv 2>/dev/null | while IFS='| ' read -r _ version _; do
        ! dpkg --compare-versions "$version" ge "1:$oldest_qemu" || echo yes
    done | grep -q yes
}

add_backports() {
    local release targets mirror
    release=$(. /etc/os-release && printf %s "${VERSION_CODENAME:-}")
    targets=$(apt-get indextargets --format '$(RELEASE) $(REPO_URI)' 'Created-By: Packages')
    mirror=$(awk -v release="$release" '$1 == release && $2 !~ /^cdrom:/ { print $2; exit }' <<<"$targets")
    if [ -z "$mirror" ]; then
        say "error: no QEMU $oldest_qemu to install, and apt has no source for Debian's suite \"$release\""
        exit 1
    fi
    if ! grep -q "^$release-backports " <<<"$targets"; then
        say "adding $release-backports to apt's sources (/etc/apt/sources.list.d/understudy-backports.sources)"
        cat >/etc/apt/sources.list.d/understudy-backports.sources <<END
Types: deb
URIs: $mirror
Suites: $release-backports
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg
END
    fi
    apt update
    backports="$release-backports"
}

install_missing() {
    [ ${#missing[@]} -gt 0 ] || return 0
    if [ "$(id -u)" != 0 ]; then
        say "error: these Debian packages are missing: ${missing[*]}"
        say "run this once as root, which installs them, or install them by hand"
        exit 1
    fi
    say "installing Debian packages: ${missing[*]}"
    apt update
    local backports=
    if [[ " ${missing[*]} " == *" qemu-system-riscv "* ]] && ! qemu_is_offered; then
        add_backports
    fi
    local had_etcd=yes
    command -v etcd >/dev/null || had_etcd=
    apt --no-install-recommends ${backports:+-t "$backports"} install "${missing[@]}"
    # The package starts a server; demo and tests start their own.
    if [ -z "$had_etcd" ] && command -v etcd >/dev/null && [ -d /run/systemd/system ]; then
        systemctl disable --quiet --now etcd || true
    fi
    hash -r
}

need_rust() {
    command -v cargo >/dev/null && return
    say "error: cargo not found: install Rust 1.95 or newer first"
    exit 1
}
