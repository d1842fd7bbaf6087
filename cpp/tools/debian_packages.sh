# Sourced by the scripts fetch_*.sh: downloads Debian's packages with a private apt configuration and unpacks them, without
# root privileges; nothing is installed. The sourcing script defines `fail CODE MESSAGE FIX`, which exits.

# debian_codename WHAT FIX: prints the codename of this Debian. WHAT needs Debian, for the error; FIX: what to do elsewhere.
debian_codename() {
    local tool id
    for tool in apt-get dpkg-deb; do
        command -v $tool >/dev/null || fail 3 "$1 from Debian's packages, which needs $tool" "$2"
    done
    id=$(. /etc/os-release && echo "${ID:-}")
    [ "$id" = debian ] || fail 3 "$1 from Debian's packages, and this system is ${id:-unknown}" "$2"
    (. /etc/os-release && echo "${VERSION_CODENAME:-}")
}

# debian_unpack FOLDER SUITE ARCHITECTURE alone|dependencies FIX PACKAGE...
# Unpacks packages of SUITE's main component into the existing FOLDER: these alone, or with all that they depend on.
debian_unpack() (
    folder=$1 suite=$2 architecture=$3 with=$4 fix=$5
    shift 5
    codename=$(debian_codename "$* must come" "$fix") || exit $?
    mirror=$(apt-get indextargets --format '$(RELEASE) $(COMPONENT) $(REPO_URI)' 'Created-By: Packages' \
        | awk -v release="$codename" '$1 == release && $2 == "main" { print $3; exit }')
    [ -n "$mirror" ] || fail 3 "the apt sources have no mirror of Debian $codename" "$fix"
    signed=
    keys=/usr/share/keyrings/debian-archive-keyring.gpg
    [ ! -r $keys ] || signed="signed-by=$keys "

    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    mkdir -p "$work"/state/lists/partial "$work"/cache/archives/partial "$work/none"
    : >"$work/status"
    echo "deb [${signed}arch=$architecture] $mirror $suite main" >"$work/sources.list"
    cat >"$work/apt.conf" <<CONF
Dir::State "$work/state";
Dir::State::status "$work/status";
Dir::Cache "$work/cache";
Dir::Etc::sourcelist "$work/sources.list";
Dir::Etc::sourceparts "$work/none";
Dir::Etc::preferences "$work/none/preferences";
Dir::Etc::preferencesparts "$work/none";
APT::Architecture "$architecture";
#clear APT::Architectures;
APT::Architectures { "$architecture"; };
APT::Default-Release "";
APT::Install-Recommends "false";
APT::Sandbox::User "";
Acquire::Languages "none";
Acquire::Retries "3";
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
CONF
    get() {
        apt-get -q -c "$work/apt.conf" update || return
        if [ "$with" = alone ]; then
            (cd "$work/cache/archives" && apt-get -q -c "$work/apt.conf" download "$@")
        else
            apt-get -q -y -c "$work/apt.conf" install --download-only "$@"
        fi
    }
    get "$@" >"$work/log" 2>&1 \
        || { tail -n 5 "$work/log" >&2; fail 3 "$* of Debian $suite cannot be downloaded" "$fix"; }
    for file in "$work"/cache/archives/*.deb; do
        dpkg-deb --fsys-tarfile "$file" | tar -x -C "$folder" --keep-directory-symlink --no-same-owner \
            || fail 3 "$(basename "$file") cannot be unpacked into $folder" "$fix"
    done
)
