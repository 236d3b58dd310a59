# shellcheck shell=bash
# For .ci/packages and tests/lab/prepare, which need newer packages than an older Debian has. No host is named: the mirror is the one
# that the machine uses already.

# backports_list FILE [OPTION...]: writes FILE, a list of sources for apt (Dir::Etc::SourceList): those of the machine, and the backports
# of its release. Prints what the backports are called, and nothing on a system that is not Debian. OPTIONs go to apt.
backports_list() {
    local file=$1 mirror='' codename='' known='' uri name origin component
    shift
    # shellcheck disable=SC2016 # apt fills these in
    while IFS='|' read -r uri name origin component; do
        [[ $origin == Debian* && $component == main ]] || continue
        case $name in
            *-backports) known="$known $name" ;;
            *[!a-z]*) ;;
            *) mirror=$uri codename=$name ;;
        esac
    done < <(apt-get "$@" indextargets --format '$(REPO_URI)|$(CODENAME)|$(ORIGIN)|$(COMPONENT)' 'Created-By: Packages')
    [ -n "$mirror" ] || return 0
    {
        [ ! -f /etc/apt/sources.list ] || cat /etc/apt/sources.list
        # Twice the same, written in two ways, is an error to apt.
        [[ " $known " == *" $codename-backports "* ]] || echo "deb $mirror $codename-backports main"
    } >"$file"
    echo "$codename-backports"
}
