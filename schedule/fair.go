package schedule

// class has a runner's requests of one priority.
type class struct {
	tree       *tree // nil until there was a request
	fifo       fifo
	accounts   map[string]*account
	backlogged []*account // clients with waiting requests
	positive   int        // of these, with a deficit above 0
	round      int
	quantum    int // of this round: the same for all who come while it lasts
	sweep      int // how many accounts there are when those of clients that are gone are next forgotten
}

const leastSweep = 1024

// account is what a client is owed, in tokens: see class.refill.
type account struct {
	name    string
	deficit int
	round   int // when it last got a quantum
	waiting int
	running int
	index   int // in class.backlogged
	fifo    fifo
}

// quantum returns how many tokens a client may take before others: at least the largest prompt of late.
func (x *runner) quantum() int {
	return max(int(x.rates.largest), int(quantum*x.rates.size.v), slack)
}

func (c *class) add(it *item, client string, quantum int) {
	a, ok := c.accounts[client]
	if !ok {
		if len(c.accounts) >= max(c.sweep, leastSweep) {
			c.forget()
		}
		a = &account{name: client, round: c.round - 1}
		c.accounts[client] = a
	}
	it.account = a
	if a.waiting == 0 {
		if len(c.backlogged) == 0 {
			c.quantum = quantum
		}
		if a.round != c.round { // it was not there when this round began
			a.deficit, a.round = min(a.deficit, 0)+c.quantum, c.round
		}
		a.index = len(c.backlogged)
		c.backlogged = append(c.backlogged, a)
		if a.deficit > 0 {
			c.positive++
		}
	}
	a.waiting++
	a.fifo.push(it)
	c.fifo.push(it)
	c.tree.wait(it)
}

func (c *class) remove(it *item, serve bool) {
	a := it.account
	a.fifo.dropped()
	c.fifo.dropped()
	c.tree.leave(it, serve)
	if a.waiting--; a.waiting == 0 {
		last := c.backlogged[len(c.backlogged)-1]
		c.backlogged[a.index], last.index = last, a.index
		c.backlogged = c.backlogged[:len(c.backlogged)-1]
		if a.deficit > 0 {
			c.positive--
		}
	}
}

// charge takes tokens of a client's deficit.
func (c *class) charge(a *account, tokens int) {
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

// refill begins a round when no client that waits has anything left: each gets as many quanta as it takes for one of
// them to go on. Clients that do not wait get nothing (Sheng et al., "Fairness in
// serving large language models", arXiv 2401.00588; Cao et al., "Locality-aware fair scheduling", arXiv 2501.14312).
func (c *class) refill(quantum int) {
	if c.positive > 0 || len(c.backlogged) == 0 {
		return
	}
	most := c.backlogged[0].deficit
	for _, a := range c.backlogged {
		most = max(most, a.deficit)
	}
	n := 1 + -most/quantum
	c.round++
	c.quantum = quantum
	for _, a := range c.backlogged {
		a.round = c.round
		if a.deficit += n * quantum; a.deficit > 0 {
			c.positive++
		}
	}
}

// forget forgets the clients that are gone, and what they owe.
func (c *class) forget() {
	for name, a := range c.accounts {
		if a.waiting == 0 && a.running == 0 {
			delete(c.accounts, name)
		}
	}
	c.sweep = 2 * len(c.accounts)
}
