#compdef ollama-cacheproxy
# zsh completion for ollama-cacheproxy
_ollama-cacheproxy() {
	local line
	local -a lines candidates
	lines=("${(@f)$(ollama-cacheproxy completion words -- "${(@)words[2,CURRENT]}" 2>/dev/null)}")
	if [[ $lines[1] == :files ]]; then
		compset -P '--*='
		_files
		return
	fi
	for line in $lines; do
		line=${line//:/\\:}
		candidates+=("${line/$'\t'/:}")
	done
	_describe -o 'ollama-cacheproxy' candidates
}
# As a file of fpath this is the function's body; where it is sourced, the function is to be registered.
if [[ $funcstack[1] == _ollama-cacheproxy ]]; then
	_ollama-cacheproxy "$@"
else
	compdef _ollama-cacheproxy ollama-cacheproxy
fi
