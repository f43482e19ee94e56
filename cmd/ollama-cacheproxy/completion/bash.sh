# bash completion for ollama-cacheproxy
_ollama_cacheproxy() {
	local line words word cur=${COMP_WORDS[COMP_CWORD]}
	# bash divides words at "=" and ":" too; the program is given them whole.
	read -ra words <<<"${COMP_LINE:0:COMP_POINT}"
	[[ ${COMP_LINE:0:COMP_POINT} == *[[:space:]] ]] && words+=("")
	word=${words[${#words[@]}-1]}
	[[ $cur == = || $cur == : ]] && cur=
	COMPREPLY=()
	while IFS=$'\t' read -r line _; do
		if [[ $line == :files ]]; then
			compopt -o default 2>/dev/null
		else
			COMPREPLY+=("${line#"${word%"$cur"}"}")
		fi
	done < <(ollama-cacheproxy completion words -- "${words[@]:1}" 2>/dev/null)
}
complete -F _ollama_cacheproxy ollama-cacheproxy
