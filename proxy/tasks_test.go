package proxy

import (
	"fmt"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// tasks are the requests that a chat page sends by itself, such as Open WebUI: right after an
// answer, all at once, and for the same user and chat. After each answer it asks for follow-up
// questions, after the first also for a title and tags. Each begins with different instructions,
// followed by a part of the conversation.
func (o *office) tasks(w who, id uint64, first bool, told func(reply)) {
	w.whole = true
	kinds := []uint64{11, 12, 13}
	if !first {
		kinds = kinds[:1]
	}
	var wg sync.WaitGroup
	for _, kind := range kinds {
		wg.Go(func() {
			told(o.ask(w, "/api/chat", w.chatBody(10, turn("user", say(kind, 150)+say(id, 50)))))
		})
	}
	wg.Wait()
}

// pages are the results of chats and their pages' tasks.
type pages struct {
	chats, tasks []time.Duration // their waits
	evaluated    int             // tokens of the chats' prompts
	longest      time.Duration
}

// chatPages lets three people chat, beside a script or alone.
func chatPages(t *testing.T, h house, script, tasks bool) (p pages) {
	synctest.Test(t, func(t *testing.T) {
		o := newOffice(t, h)
		var mu sync.Mutex
		var wg sync.WaitGroup
		if script {
			wg.Go(func() { o.script(who{peer: frontAddress}) })
		}
		for i := range uint64(3) {
			w := openWebUI(frontAddress, fmt.Sprint("user", i))
			asked := false
			answered := func(r reply) {
				mu.Lock()
				defer mu.Unlock()
				p.chats = append(p.chats, r.waited)
				p.evaluated += r.Prompt - r.Cached
				if !tasks {
					return
				}
				first := !asked
				asked = true
				wg.Go(func() {
					o.tasks(w, i, first, func(r reply) {
						mu.Lock()
						defer mu.Unlock()
						p.tasks = append(p.tasks, r.waited)
					})
				})
			}
			wg.Go(func() {
				time.Sleep(time.Duration(i) * 3 * time.Second)
				o.chat(w, 100+i, 8, 20*time.Second, answered)
			})
		}
		wg.Wait()
		synctest.Wait()
		p.longest = o.longest
	})
	slices.Sort(p.chats)
	slices.Sort(p.tasks)
	return p
}

// TestChatPageTasks: a page's own requests do not evict a chat for good if the server has its usual
// host cache, and no chat waits for more than one request because of them.
func TestChatPageTasks(t *testing.T) {
	for _, h := range []house{{slots: 1, told: true}, {slots: 4, told: true}} {
		for _, script := range []bool{false, true} {
			t.Run(fmt.Sprint(h, ", beside a script ", script), func(t *testing.T) {
				without, with := chatPages(t, h, script, false), chatPages(t, h, script, true)
				n, m := len(with.chats), len(with.tasks)
				t.Logf("%d turns of chats evaluate %d tokens and wait %v (median), %v",
					n, without.evaluated, without.chats[n/2], without.chats[n-1])
				t.Logf("with %d tasks they evaluate %d and wait %v, %v; the tasks wait %v, %v", m,
					with.evaluated, with.chats[n/2], with.chats[n-1], with.tasks[m/2], with.tasks[m-1])
				if float64(with.evaluated) > 1.02*float64(without.evaluated) {
					t.Errorf("with tasks the chats evaluate %d tokens, without %d", with.evaluated, without.evaluated)
				}
				if longest := with.chats[n-1]; longest > with.longest {
					t.Errorf("with tasks a chat waits for %v, a request takes up to %v", longest, with.longest)
				}
			})
		}
	}
}
