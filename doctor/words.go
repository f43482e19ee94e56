package doctor

import (
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"
)

// number formats an integer with separators of thousands.
func number(n int) string {
	s := strconv.Itoa(n)
	for i := len(s) - 3; i > 0 && s[i-1] != '-'; i -= 3 {
		s = s[:i] + "," + s[i:]
	}
	return s
}

// plural returns a count with its noun.
func plural(n int, what string) string {
	if n != 1 {
		what += "s"
	}
	return number(n) + " " + what
}

func times(n int) string {
	switch n {
	case 1:
		return "once"
	case 2:
		return "twice"
	}
	return number(n) + " times"
}

// duration returns seconds as people write them, with two significant digits.
func duration(seconds float64) string {
	switch {
	case seconds >= 10*365*24*3600:
		return "ever"
	case seconds >= 3*24*3600:
		return fmt.Sprintf("%.0f days", seconds/24/3600)
	case seconds >= 3*3600:
		return fmt.Sprintf("%.0f hours", seconds/3600)
	case seconds >= 180:
		return fmt.Sprintf("%.0f minutes", seconds/60)
	case seconds >= 10:
		return fmt.Sprintf("%.0f s", seconds)
	case seconds >= 1:
		return fmt.Sprintf("%.1f s", seconds)
	}
	return fmt.Sprintf("%.0f ms", seconds*1000)
}

// hold returns a keep_alive that is longer than a gap.
func hold(gap float64) string {
	for _, hours := range []int{1, 24} {
		if 2*gap <= float64(hours)*3600 {
			return (time.Duration(hours) * time.Hour).String()[:len(strconv.Itoa(hours))+1]
		}
	}
	return "-1"
}

// roundContext returns a context length for that many tokens: the next power of two.
func roundContext(tokens int) int {
	return 1 << int(math.Ceil(math.Log2(float64(max(tokens, 2048)))))
}

func join(list []string) string {
	if len(list) < 2 {
		return strings.Join(list, "")
	}
	return strings.Join(list[:len(list)-1], ", ") + " and " + list[len(list)-1]
}

// named says who an asker is.
func (a Asker) named() string { return Name{a.Name, a.Client, a.Agent}.String() }

// String says who it is.
func (n Name) String() string {
	who := "client " + n.Client[:min(len(n.Client), 8)]
	if n.Name != "" {
		who = "key " + n.Name
	}
	if n.Agent != "" {
		who = n.Agent + " (" + who + ")"
	}
	return who
}

func names(list []Name) string {
	var all []string
	for _, n := range list {
		all = append(all, n.String())
	}
	return join(all)
}

// article begins a sentence about a kind of thing.
func article(kind string) string {
	switch kind {
	case "uuid":
		return "A random id"
	case "text":
		return "Text"
	}
	return "A " + kind
}
