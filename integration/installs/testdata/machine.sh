# Runs as root on a separate Debian that has booted its own systemd; installs_linux_test.go starts
# it. OLLAMA_CACHEPROXY_LISTEN and OLLAMA_CACHEPROXY_UPSTREAM, a real Ollama, are in the environment
# of all services; OLLAMA_HOST, a free address, and OLLAMA_MODELS are for an Ollama that is started
# here. The last line of the log shows what failed.
set -euxo pipefail
proxy=http://$OLLAMA_CACHEPROXY_LISTEN
settings=/etc/default/ollama-cacheproxy

# answers PATH [curl's flags…] sends a request to the proxy, which may still be starting.
answers() {
	local path=$1
	shift
	curl --silent --show-error --fail --retry 120 --retry-delay 1 --retry-max-time 120 --retry-connrefused "$@" "$proxy$path"
}
pid() { systemctl show --property MainPID --value ollama-cacheproxy; }
# not COMMAND fails if COMMAND succeeds: "! COMMAND" alone never ends the shell.
not() { if "$@"; then return 1; fi; }
active() { test "$(systemctl is-active ollama-cacheproxy)" = active; }
# is STATUS [curl's flags…] succeeds if the list of models has that status.
is() {
	local want=$1
	shift
	answers /_cacheproxy/health >/dev/null
	test "$(curl --silent --output /dev/null --write-out '%{http_code}' "$@" "$proxy/api/tags")" = "$want"
}
# set_to NAME VALUE edits a line of the settings, which may begin with "#".
set_to() { sed --in-place "s|^#\?OLLAMA_CACHEPROXY_$1=.*|OLLAMA_CACHEPROXY_$1=$2|" $settings && grep --quiet "^OLLAMA_CACHEPROXY_$1=$2" $settings; }

# written SECTION runs the commands of a section of install.md, with a free address.
written() {
	awk -v section="## $1" '$0 == section {on = 1} /^## / && $0 != section {on = 0}
		/^```/ {code = on && /^```console/; next} code' install.md |
		sed "s|127.0.0.1:11435|$OLLAMA_CACHEPROXY_LISTEN|; s|linux_amd64|linux_$(dpkg --print-architecture)|" >written.sh
	test -s written.sh
	(sudo() { "$@"; }; . ./written.sh)
}

: '=== as install.md has it'
written 'An archive'
test ! -e /usr/local/bin/ollama-cacheproxy
written 'Debian and Ubuntu'
test ! -e /usr/bin/ollama-cacheproxy

: '=== the deb is installed, runs as a user of its own, and does what it is for'
dpkg --install package.deb
active
systemctl --quiet is-enabled ollama-cacheproxy
answers /_cacheproxy/ready
test "$(ps -o user:32= -p "$(pid)")" = ollama-cacheproxy
# The restrictions are in force, not only in the file.
grep --quiet --perl-regexp '^Seccomp:\t2' "/proc/$(pid)/status"
grep --quiet --perl-regexp '^NoNewPrivs:\t1' "/proc/$(pid)/status"
grep --quiet --perl-regexp '^CapBnd:\t0+$' "/proc/$(pid)/status"
systemd-analyze security --no-pager --threshold=20 ollama-cacheproxy
systemd-analyze verify ollama-cacheproxy.service 2>&1 | tee verified
test ! -s verified
answers /api/chat --data '{"model": "smollm2", "messages": [{"role": "user", "content": "Say a word."}], "stream": false, "options": {"num_predict": 4}}' |
	grep '"done":true'
answers /metrics | grep --perl-regexp '^ollama_cacheproxy_requests_total\{.*/api/chat.*\} 1$'
ollama-cacheproxy --version | grep "commit $COMMIT"
runuser --user ollama-cacheproxy -- ollama-cacheproxy --check --listen 127.0.0.1:0

: '=== settings: a changed value is in force after a restart, a file of keys is read again at a reload'
set_to KEEP_ALIVE 7h
mkdir /etc/ollama-cacheproxy
(umask 027; echo first >/etc/ollama-cacheproxy/keys; chgrp ollama-cacheproxy /etc/ollama-cacheproxy/keys)
set_to API_KEYS_FILE /etc/ollama-cacheproxy/keys
systemctl restart ollama-cacheproxy
tr '\0' '\n' <"/proc/$(pid)/environ" | grep --line-regexp OLLAMA_CACHEPROXY_KEEP_ALIVE=7h
is 401
is 200 --header 'Authorization: Bearer first'
is 401 --header 'Authorization: Bearer second'
before=$(pid)
echo second >>/etc/ollama-cacheproxy/keys
systemctl reload ollama-cacheproxy
answers /api/tags --retry-all-errors --header 'Authorization: Bearer second' --output /dev/null
test "$before" = "$(pid)"

: '=== an upgrade keeps the settings, and restarts the service'
cp $settings settings.kept
dpkg --install package.deb
active
test "$before" != "$(pid)"
cmp $settings settings.kept
is 200 --header 'Authorization: Bearer second'

: '=== a wrong setting ends it for good, and the log names it'
set_to KEEP_ALIVE soon
systemctl restart ollama-cacheproxy || true
timeout 60 sh -c 'until systemctl --quiet is-failed ollama-cacheproxy; do sleep 0.1; done'
test "$(systemctl show --property ExecMainStatus --value ollama-cacheproxy)" = 2
journalctl --unit ollama-cacheproxy --no-pager | grep -e '--keep-alive'
set_to KEEP_ALIVE 24h
systemctl restart ollama-cacheproxy

: '=== the shells complete, and man knows it'
bash -c '. /usr/share/bash-completion/bash_completion; _completion_loader ollama-cacheproxy || true; complete -p ollama-cacheproxy' |
	grep _ollama_cacheproxy
fish --command "complete --do-complete 'ollama-cacheproxy --log-f'" | grep --perl-regexp '^--log-format\ttext, json'
timeout 60 zsh zsh-completes.zsh | grep 'log-format=json'
MANPATH=/usr/share/man man --where ollama-cacheproxy
man --local-file --warnings=mac,escape,syntax,missing,font /usr/share/man/man1/ollama-cacheproxy.1.gz 2>warned | grep 'OLLAMA_CACHEPROXY_UPSTREAM'
# Ignore a long name that does not fit into a narrow line.
not grep --invert-match 'cannot adjust line' warned

: '=== the deb is removed: nothing runs, the settings stay; installed again, it goes on; purged, all is gone'
dpkg --listfiles ollama-cacheproxy | while read -r file; do [ -d "$file" ] || echo "$file"; done >files
test "$(wc -l <files)" -ge 10
dpkg --remove ollama-cacheproxy
not active
not curl --silent "$proxy/_cacheproxy/health"
cmp $settings <(sed 's/^OLLAMA_CACHEPROXY_KEEP_ALIVE=.*/OLLAMA_CACHEPROXY_KEEP_ALIVE=24h/' settings.kept)
dpkg --install package.deb
active
dpkg --purge ollama-cacheproxy
not active
while read -r file; do test ! -e "$file"; done <files
test -z "$(find /etc/systemd -name 'ollama-cacheproxy*')"

: '=== stored contexts, with the drop-ins of both services and a real Ollama'
useradd --system --create-home --home-dir /usr/share/ollama ollama
# As Ollama's installer writes it.
cat >/etc/systemd/system/ollama.service <<'UNIT'
[Unit]
Description=Ollama Service
After=network-online.target
[Service]
ExecStart=/usr/local/bin/ollama serve
User=ollama
Group=ollama
Restart=always
RestartSec=3
UNIT
dpkg --install package.deb
# At another address, which Ollama also takes from its environment.
echo "OLLAMA_CACHEPROXY_UPSTREAM=$OLLAMA_HOST" >>$settings
cp --recursive /usr/share/doc/ollama-cacheproxy/*.service.d /etc/systemd/system/
systemctl daemon-reload
systemctl restart ollama ollama-cacheproxy
systemd-analyze security --no-pager --threshold=20 ollama-cacheproxy
test "$(ps -o user= -p "$(pid)")" = ollama
prompt=$(for i in {1..100}; do echo -n "word $i of a long text, "; done)
chat() {
	answers /api/chat --data "{\"model\": \"smollm2\", \"stream\": false, \"options\": {\"num_predict\": 2, \"num_ctx\": 4096},
		\"messages\": [{\"role\": \"system\", \"content\": \"$prompt\"}, {\"role\": \"user\", \"content\": \"$1\"}]}"
}
answers /_cacheproxy/ready
chat one
# The state is saved by the time that the model is unloaded.
answers /api/generate --data '{"model": "smollm2", "keep_alive": 0}'
chat two
answers /metrics | grep --perl-regexp '^ollama_cacheproxy_contexts_attached_total(\{.*\})? 1$'
systemctl stop ollama ollama-cacheproxy
dpkg --purge ollama-cacheproxy
rm --recursive /etc/systemd/system/ollama*

: '=== the rpm, too, by rpm itself; what it depends on has other names here'
rpm --install --nodeps package.rpm
active
answers /_cacheproxy/ready
rpm --query --all --list | grep /usr/share/zsh/site-functions/_ollama-cacheproxy
rpm --upgrade --replacepkgs --nodeps package.rpm
active
rpm --erase ollama-cacheproxy
not active
test ! -e /usr/bin/ollama-cacheproxy
test -z "$(find /etc/systemd -name 'ollama-cacheproxy*')"

: '=== and where no systemd runs, as in an image'
unshare --mount --pid --fork --mount-proc sh -euxc '
	mount -t tmpfs none /run
	rpm --install --nodeps package.rpm
	rpm --erase ollama-cacheproxy
	dpkg --install package.deb
	dpkg --purge ollama-cacheproxy'
not rpm --query ollama-cacheproxy
test -z "$(find /etc/systemd -name 'ollama-cacheproxy*')"

: '=== the program alone, as in the image that the Dockerfile makes: no other file, and nobody'
mkdir -p image
dpkg --fsys-tarfile package.deb | tar --extract --directory image --strip-components 3 ./usr/bin/ollama-cacheproxy
env --ignore-environment "$(command -v chroot)" --userspec=65532:65532 image /ollama-cacheproxy --check --listen 0.0.0.0:0 --upstream "$OLLAMA_CACHEPROXY_UPSTREAM"

: '=== the formula'
VERSION=$(image/ollama-cacheproxy --version | cut --delimiter ' ' --fields 2)
export VERSION PROGRAM=$PWD/image/ollama-cacheproxy
ruby -w homebrew.rb formula.rb "$PWD/brewed"
echo all is well
