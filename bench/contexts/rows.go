package main

import (
	"fmt"
	"time"
)

// over returns how many tokens were evaluated, in all and as a multiple of the least possible.
func (c compared) over(n int) (text string, times float64) {
	if len(c.least.done) == 0 {
		return fmt.Sprint(n), 0
	}
	times = float64(n) / float64(c.least.evaluated)
	return fmt.Sprintf("%d (%.2f)", n, times), times
}

// rows returns the rows that each comparison begins with: the tokens, with most times the least
// possible as the target (0: there is none), and further figures.
func (c compared) rows(most float64) []row {
	direct, proxied := c.direct.total(), c.proxied.total()
	d, _ := c.over(direct.evaluated)
	p, times := c.over(proxied.evaluated)
	must := fmt.Sprintf("≤ %.2f × the least possible, %d", most, c.least.evaluated)
	head := target("", d, p, must, times <= most)
	if most == 0 {
		head[4], head[5] = "", ""
	}
	head[0], head[1] = c.w.name+": tokens evaluated", fmt.Sprint(len(direct.done))
	all := []row{head,
		note("loads", fmt.Sprint(direct.loads), fmt.Sprint(proxied.loads)),
		note("seconds", seconds(direct.wall), seconds(proxied.wall)),
		note("time to first token without loading, median, ms",
			milliseconds(direct.first()), milliseconds(proxied.first())),
		note("answers that differ", "", fmt.Sprintf("%d of %d", c.differ(), len(direct.done))),
	}
	return all
}

// differ returns how many answers through the proxy differ from the direct ones.
func (c compared) differ() int {
	texts := map[int]string{}
	for _, d := range c.direct.total().done {
		texts[d.id] = d.Text
	}
	n := 0
	for _, d := range c.proxied.total().done {
		if texts[d.id] != d.Text {
			n++
		}
	}
	return n
}

func seconds(d time.Duration) string { return fmt.Sprintf("%.1f", d.Seconds()) }

func milliseconds(d time.Duration) string {
	return fmt.Sprintf("%.1f", float64(d)/float64(time.Millisecond))
}
