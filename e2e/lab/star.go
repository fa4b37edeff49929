package lab

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"runtime"
	"strconv"

	"golang.org/x/sys/unix"
)

// Star is a store's network: a namespace with a bridge, to which each node is joined
// by a link of its own, from a namespace of its own. The machine that the lab is on
// reaches neither, and they reach nobody else.
type Star struct {
	Host string // the store's address
	lab  *Lab
	name string
	next int // the last byte of the next node's address
}

// Port is a node's place in a Star.
type Port struct {
	Host string // the node's address
	star *Star
	name string // of the node's namespace
	port string // of the device on the store's side
}

const starDevice = "eth0" // of a node, in its own namespace

// NewStar makes a star without nodes.
func (l *Lab) NewStar() (*Star, error) {
	s := &Star{Host: "10.77.0.1", lab: l, next: 2}
	var err error
	if s.name, err = l.newNamespace(); err != nil {
		return nil, err
	}
	for _, c := range [][]string{
		{"ip", "-n", s.name, "link", "add", "br0", "type", "bridge"},
		{"ip", "-n", s.name, "addr", "add", s.Host + "/24", "dev", "br0"},
		{"ip", "-n", s.name, "link", "set", "br0", "up"},
		{"ip", "-n", s.name, "link", "set", "lo", "up"},
	} {
		if err := run(c...); err != nil {
			return nil, err
		}
	}
	return s, nil
}

// newNamespace makes a network namespace that the lab removes.
func (l *Lab) newNamespace() (string, error) {
	name := fmt.Sprintf("%s%dx%d", linkPrefix, os.Getpid(), labNumber.Add(1))
	if err := run("ip", "netns", "add", name); err != nil {
		return "", err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.networks = append(l.networks, &Link{name: name, host: name + "h"})
	return name, nil
}

// Enter is the command that runs what follows it in the store's network.
func (s *Star) Enter() []string { return enter(s.name) }

// Enter is the command that runs what follows it in the node's network.
func (p *Port) Enter() []string { return enter(p.name) }

// enter uses nsenter and not "ip netns exec", which mounts another /sys.
func enter(namespace string) []string { return []string{"nsenter", "--net=/run/netns/" + namespace} }

// Add joins a node. Rate, in both directions, is tc's spelling ("1gbit"), or empty for
// no limit.
func (s *Star) Add(rate string) (*Port, error) {
	p := &Port{Host: fmt.Sprintf("10.77.0.%d", s.next), star: s, port: "p" + strconv.Itoa(s.next)}
	s.next++
	var err error
	if p.name, err = s.lab.newNamespace(); err != nil {
		return nil, err
	}
	commands := [][]string{
		{"ip", "-n", s.name, "link", "add", p.port, "type", "veth", "peer", "name", starDevice, "netns", p.name},
		{"ip", "-n", s.name, "link", "set", p.port, "master", "br0", "up"},
		{"ip", "-n", p.name, "addr", "add", p.Host + "/24", "dev", starDevice},
		{"ip", "-n", p.name, "link", "set", starDevice, "up"},
		{"ip", "-n", p.name, "link", "set", "lo", "up"},
	}
	if rate != "" {
		for _, d := range [][2]string{{s.name, p.port}, {p.name, starDevice}} {
			// As for a Link.
			commands = append(commands, []string{"tc", "-n", d[0], "qdisc", "add", "dev", d[1],
				"root", "tbf", "rate", rate, "burst", "256kb", "latency", "50ms"})
		}
	}
	for _, c := range commands {
		if err := run(c...); err != nil {
			return nil, err
		}
	}
	return p, nil
}

// SetUp connects the node's cable, or pulls it.
func (p *Port) SetUp(up bool) error {
	state := "down"
	if up {
		state = "up"
	}
	return run("ip", "-n", p.star.name, "link", "set", p.port, state)
}

// Listen listens at a TCP port of the store's address, from this process.
func (s *Star) Listen(port string) (l net.Listener, err error) {
	err = inside(s.name, func() (err error) {
		l, err = net.Listen("tcp", net.JoinHostPort(s.Host, port))
		return err
	})
	return l, err
}

// Dial connects from the store's network, from this process.
func (s *Star) Dial(ctx context.Context, address string) (net.Conn, error) {
	return dialInside(ctx, s.name, address)
}

// Dial connects from the node's network, from this process.
func (p *Port) Dial(ctx context.Context, address string) (net.Conn, error) {
	return dialInside(ctx, p.name, address)
}

func dialInside(ctx context.Context, namespace, address string) (c net.Conn, err error) {
	err = inside(namespace, func() (err error) {
		var d net.Dialer
		c, err = d.DialContext(ctx, "tcp", address)
		return err
	})
	return c, err
}

// inside runs f in a network namespace. Sockets that it makes stay there.
func inside(namespace string, f func() error) error {
	done := make(chan error, 1)
	go func() {
		// The thread ends with the goroutine: it is never unlocked.
		runtime.LockOSThread()
		done <- func() error {
			ns, err := os.Open("/run/netns/" + namespace)
			if err != nil {
				return err
			}
			defer ns.Close()
			if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
				return fmt.Errorf("enter network namespace %s: %w", namespace, err)
			}
			return f()
		}()
	}()
	return <-done
}

// Bytes returns how many bytes, headers included, the node has received and sent.
func (p *Port) Bytes() (received, sent int64, err error) {
	out, err := output(p.star.lab.Command(context.Background(), "ip", "-n", p.name, "-j", "-s", "link", "show", starDevice), []string{"ip", "link"})
	if err != nil {
		return 0, 0, err
	}
	var links []struct {
		Stats struct {
			RX, TX struct{ Bytes int64 }
		} `json:"stats64"`
	}
	if err := json.Unmarshal(out, &links); err != nil || len(links) != 1 {
		return 0, 0, errors.Join(fmt.Errorf("ip -j -s link printed %.200q", out), err)
	}
	return links[0].Stats.RX.Bytes, links[0].Stats.TX.Bytes, nil
}
