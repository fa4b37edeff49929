package lab

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
)

// Link is a network namespace joined to this machine by a pair of virtual Ethernet
// devices, with the direction from the namespace to the machine limited in rate: a
// server inside seems to be behind a slower network.
type Link struct {
	Host string // this machine's address on the link
	Peer string // the namespace's address
	Rate string // as tc spells it, say 1gbit; empty when not limited

	name string // of the namespace
	host string // this end's device
}

// Names hold the owner's pid, so that a sweep knows whose they are: tw<pid>x<number>
// for namespaces, with h and p after it for devices (15 bytes at most).
const linkPrefix = "tw"

// NewLink makes a link of the lab. Rate is tc's spelling ("1gbit"), or empty for no
// limit.
func (l *Lab) NewLink(rate string) (*Link, error) {
	number := labNumber.Add(1)
	name := fmt.Sprintf("%s%dx%d", linkPrefix, os.Getpid(), number)
	link := &Link{Rate: rate, name: name, host: name + "h"}
	if len(link.host) > 15 {
		return nil, fmt.Errorf("device name %s is too long", link.host)
	}
	var err error
	link.Host, link.Peer, err = freeNetwork(os.Getpid() + int(number))
	if err != nil {
		return nil, err
	}
	l.mu.Lock()
	l.networks = append(l.networks, link)
	l.mu.Unlock()

	peer := name + "p"
	commands := [][]string{
		{"ip", "netns", "add", name},
		{"ip", "link", "add", link.host, "type", "veth", "peer", "name", peer, "netns", name},
		{"ip", "addr", "add", link.Host + "/30", "dev", link.host},
		{"ip", "link", "set", link.host, "up"},
		{"ip", "-n", name, "addr", "add", link.Peer + "/30", "dev", peer},
		{"ip", "-n", name, "link", "set", peer, "up"},
		{"ip", "-n", name, "link", "set", "lo", "up"},
	}
	if rate != "" {
		// The burst must hold the largest segment the devices exchange (64 KiB),
		// and what arrives in a timer tick at 1 Gbit.
		commands = append(commands, []string{"tc", "-n", name, "qdisc", "add", "dev", peer,
			"root", "tbf", "rate", rate, "burst", "256kb", "latency", "50ms"})
	}
	for _, c := range commands {
		if err := run(c...); err != nil {
			return nil, errors.Join(err, link.remove())
		}
	}
	return link, nil
}

// Bytes returns how many bytes, headers included, have come over the link to this
// machine.
func (l *Link) Bytes() (int64, error) {
	data, err := os.ReadFile("/sys/class/net/" + l.host + "/statistics/rx_bytes")
	if err != nil {
		return 0, err
	}
	return strconv.ParseInt(strings.TrimSpace(string(data)), 10, 64)
}

// Enter is the command that runs what follows it in the namespace.
func (l *Link) Enter() []string { return enter(l.name) }

func (l *Link) namespacePath() string { return "/run/netns/" + l.name }

func (l *Link) remove() error {
	// Removing the namespace removes its end of the pair, and so the pair.
	if !fileExists(l.namespacePath()) {
		return nil
	}
	if fileExists("/sys/class/net/" + l.host) {
		if err := run("ip", "link", "del", l.host); err != nil {
			return err
		}
	}
	return run("ip", "netns", "del", l.name)
}

// sweepLinks removes the links whose owner is dead.
func sweepLinks() error {
	paths, err := filepath.Glob("/run/netns/" + linkPrefix + "*x*")
	if err != nil {
		return err
	}
	var errs []error
	for _, path := range paths {
		name := filepath.Base(path)
		pid, _, _ := strings.Cut(strings.TrimPrefix(name, linkPrefix), "x")
		if n, err := strconv.Atoi(pid); err != nil || fileExists("/proc/"+strconv.Itoa(n)) {
			continue
		}
		link := &Link{name: name, host: name + "h"}
		errs = append(errs, link.remove())
	}
	return errors.Join(errs...)
}

// freeNetwork returns the two addresses of an unused /30 network in 198.18.0.0/15,
// which RFC 2544 reserves for benchmarks; it holds 32,768 of them. Seed spreads
// concurrent callers.
func freeNetwork(seed int) (host, peer string, err error) {
	used := map[string]bool{}
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		return "", "", err
	}
	for _, a := range addrs {
		if n, ok := a.(*net.IPNet); ok {
			used[n.IP.String()] = true
		}
	}
	for i := range 256 {
		n := (seed*7 + i) % 32768 * 4
		ip := func(last int) string {
			return net.IPv4(198, byte(18+(n>>16)), byte(n>>8), byte(n+last)).String()
		}
		if !used[ip(1)] {
			return ip(1), ip(2), nil
		}
	}
	return "", "", errors.New("no free network for a link in 198.18.0.0/15: remove devices named " + linkPrefix + "*")
}

func run(args ...string) error {
	c := exec.Command(args[0], args[1:]...)
	c.Env = append(os.Environ(), "PATH="+os.Getenv("PATH")+":/usr/sbin:/sbin")
	if out, err := c.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(string(out)))
	}
	return nil
}
