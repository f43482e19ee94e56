package schedule

import "cmp"

// class has a runner's requests of one priority.
type class struct {
	tree       *tree // nil until there was a request
	rates      *rates
	fifo       fifo
	accounts   map[string]*account
	fresh      int        // of all accounts
	backlogged []*account // clients with waiting requests
	sizes      float64    // the sum of the clients' mean prompt sizes
	positive   int        // how many of these have a deficit above 0
	round      int
	quantum    int // of this round: the same for all who wait during it
	sweep      int // the number of accounts at which those of departed clients are next removed
}

const leastSweep = 1024

// account is what a client is owed, in tokens: see class.refill.
type account struct {
	name    string
	size    mean // tokens of its prompts
	weight  float64
	deficit int
	round   int // when it last got a quantum …
	given   int // … and how much that was
	waiting int
	fresh   int // tokens of its waiting requests that are to be evaluated, as estimated on arrival
	running int
	index   int // in class.backlogged
	fifo    fifo
}

// fair returns how many tokens a client may take before others, with this many clients waiting. It
// is about one prompt if changes cost nothing.
func (c *class) fair(clients int) int {
	return max(int(quantum*c.sizes*max(c.rates.lostPart(), 1.0/quantum))/clients, slack)
}

func (c *class) add(it *item) {
	client := it.who.client
	a, ok := c.accounts[client]
	if !ok {
		if len(c.accounts) >= max(c.sweep, leastSweep) {
			c.forget()
		}
		a = &account{name: client, round: c.round - 1}
		c.accounts[client] = a
	}
	it.account, a.weight = a, cmp.Or(it.weight, 1)
	before := a.size.v
	if a.size.add(float64(it.tokens)); a.waiting > 0 {
		c.sizes += a.size.v - before
	} else {
		c.join(a)
	}
	a.waiting++
	a.fresh += it.fresh
	c.fresh += it.fresh
	a.fifo.push(it)
	c.fifo.push(it)
	c.tree.wait(it)
}

// join adds a client to the waiting ones.
func (c *class) join(a *account) {
	c.sizes += a.size.v
	switch fair := c.fair(len(c.backlogged) + 1); {
	case len(c.backlogged) == 0:
		c.quantum = fair
		c.round++
	case fair < c.quantum-c.quantum/8: // earlier clients asked for more at a time than others do
		c.quantum = fair
		for _, b := range c.backlogged {
			c.level(b)
		}
	}
	if a.round != c.round { // it was not there when this round began
		a.deficit, a.round, a.given = min(a.deficit, 0)+c.quantum, c.round, c.quantum
	}
	c.level(a)
	a.index = len(c.backlogged)
	c.backlogged = append(c.backlogged, a)
	if a.deficit > 0 {
		c.positive++
	}
}

// level takes back the part of a client's grant in this round that exceeds everyone's.
func (c *class) level(a *account) {
	if over := a.given - c.quantum; a.round == c.round && over > 0 {
		a.given = c.quantum
		c.owe(a, max(0, min(over, a.deficit)))
	}
}

func (c *class) remove(it *item, serve bool) {
	a := it.account
	a.fresh -= it.fresh
	c.fresh -= it.fresh
	a.fifo.dropped()
	c.fifo.dropped()
	c.tree.leave(it, serve)
	if a.waiting--; a.waiting == 0 {
		last := c.backlogged[len(c.backlogged)-1]
		c.backlogged[a.index], last.index = last, a.index
		c.backlogged = c.backlogged[:len(c.backlogged)-1]
		if c.sizes -= a.size.v; len(c.backlogged) == 0 {
			c.sizes = 0 // without rounding errors
		}
		if a.deficit > 0 {
			c.positive--
		}
	}
}

// charge makes a client pay for what it was served.
func (c *class) charge(a *account, tokens int) { c.owe(a, int(float64(tokens)/a.weight)) }

// owe subtracts tokens from a client's deficit.
func (c *class) owe(a *account, tokens int) {
	before := a.deficit > 0
	a.deficit -= tokens
	if after := a.deficit > 0; a.waiting > 0 && before != after {
		if after {
			c.positive++
		} else {
			c.positive--
		}
	}
}

// refill begins a round when no waiting client has anything left: each gets as many quanta as one
// of them needs to continue. Clients that do not wait get nothing (Sheng et al., "Fairness in
// serving large language models", arXiv 2401.00588; Cao et al., "Locality-aware fair scheduling",
// arXiv 2501.14312).
func (c *class) refill() {
	if c.positive > 0 || len(c.backlogged) == 0 {
		return
	}
	most := c.backlogged[0].deficit
	for _, a := range c.backlogged {
		most = max(most, a.deficit)
	}
	c.quantum = c.fair(len(c.backlogged))
	n := 1 + -most/c.quantum
	c.round++
	for _, a := range c.backlogged {
		a.round, a.given = c.round, c.quantum
		if a.deficit += n * c.quantum; a.deficit > 0 {
			c.positive++
		}
	}
}

// forget removes departed clients, and what they owe.
func (c *class) forget() {
	for name, a := range c.accounts {
		if a.waiting == 0 && a.running == 0 {
			delete(c.accounts, name)
		}
	}
	c.sweep = 2 * len(c.accounts)
}
