package kill

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"time"
)

// ports is how many root ports the machine has, which play functions. The last has
// somebody else's drive.
const ports = 5

// newQEMU adds the machine that a card is plugged into. It runs no guest: nobody has
// powered the slots on, so QEMU takes devices away without asking anybody. It returns the
// socket for the bridge and the one for the test.
func newQEMU(c *chain) (bridge, own string) {
	c.t.Helper()
	const program = "qemu-system-x86_64"
	if _, err := exec.LookPath(program); err != nil {
		c.t.Skipf("%s is not installed: run tools/install-deps guest, or make test-kill", program)
	}
	bridge, own = c.path("qmp"), c.path("qmp-own")
	// What qemu-io reads goes to QEMU's standard output, line by line.
	args := []string{"stdbuf", "-oL", program, "-S", "-machine", "q35", "-accel", "tcg", "-nodefaults", "-display", "none", "-m", "32",
		// Hot-plug by ACPI would need a guest to eject devices.
		"-global", "ICH9-LPC.acpi-pci-hotplug-with-bridge-support=off",
		"-qmp", "unix:" + bridge + ",server=on,wait=off", "-qmp", "unix:" + own + ",server=on,wait=off"}
	for i := range ports {
		args = append(args, "-device", fmt.Sprintf("pcie-root-port,id=rp%d,chassis=%d,slot=%d", i, i+1, i))
	}
	c.add(&member{name: "qemu", raw: true, socket: own, args: args})
	for _, command := range []struct {
		name string
		args object
	}{
		{"blockdev-add", object{"driver": "null-co", "node-name": "somebody", "size": 1 << 20, "read-zeroes": true}},
		{"device_add", object{"driver": "nvme", "id": "somebody", "drive": "somebody", "serial": "somebody", "bus": fmt.Sprintf("rp%d", ports-1)}},
	} {
		if err := qmp(own, command.name, command.args, nil); err != nil {
			c.t.Fatal(err)
		}
	}
	return bridge, own
}

// qmp executes a command of QEMU's.
func qmp(socket, command string, arguments object, result any) error {
	nc, err := net.DialTimeout("unix", socket, 5*time.Second)
	if err != nil {
		return err
	}
	defer nc.Close()
	nc.SetDeadline(time.Now().Add(10 * time.Second))
	in := json.NewDecoder(nc)
	var hello object
	if err := in.Decode(&hello); err != nil {
		return fmt.Errorf("QEMU's greeting: %w", err)
	}
	for _, c := range []object{{"execute": "qmp_capabilities"}, {"execute": command, "arguments": arguments}} {
		if err := json.NewEncoder(nc).Encode(c); err != nil {
			return err
		}
		for {
			var answer struct {
				Event  string
				Return json.RawMessage
				Error  json.RawMessage
			}
			if err := in.Decode(&answer); err != nil {
				return fmt.Errorf("QEMU's answer to %s: %w", command, err)
			}
			if answer.Event != "" {
				continue
			}
			if answer.Error != nil {
				return fmt.Errorf("QEMU refuses %s: %s", command, answer.Error)
			}
			if c["execute"] == command && result != nil {
				return json.Unmarshal(answer.Return, result)
			}
			break
		}
	}
	return nil
}

// hostState is what the card's host sees: drives, and what QEMU keeps for them.
func hostState(socket string) (state, error) {
	s := state{}
	var devices, nodes []object
	if err := qmp(socket, "qom-list", object{"path": "/machine/peripheral"}, &devices); err != nil {
		return nil, err
	}
	for _, d := range devices {
		name := fmt.Sprint(d["name"])
		if d["type"] != "child<nvme>" {
			continue
		}
		have := object{}
		for _, property := range []string{"serial", "drive"} {
			var v any
			if err := qmp(socket, "qom-get", object{"path": "/machine/peripheral/" + name, "property": property}, &v); err != nil {
				return nil, err
			}
			have[property] = v
		}
		if err := s.add("host drive "+name, have); err != nil {
			return nil, err
		}
	}
	if err := qmp(socket, "query-named-block-nodes", object{"flat": true}, &nodes); err != nil {
		return nil, err
	}
	for _, n := range nodes {
		s["host node "+fmt.Sprint(n["node-name"])] = fmt.Sprint(n["drv"], " ", n["file"])
	}
	return s, nil
}

var dumped = regexp.MustCompile(`(?m)^[0-9a-f]{8}: {1,2}((?:[0-9a-f]{2} ){16})`)

// readDrive reads bytes of the only drive of the card as the machine does, in hexadecimal.
func readDrive(c *chain, socket string, offset, length int64) (string, error) {
	raw, err := qemuIO(c, socket, fmt.Sprintf("read -v %d %d", offset, length))
	if err != nil {
		return "", err
	}
	var all strings.Builder
	for _, line := range dumped.FindAllSubmatch(raw, -1) {
		all.WriteString(strings.ReplaceAll(string(line[1]), " ", ""))
	}
	if int64(all.Len()) != 2*length {
		return "", fmt.Errorf("read %d of %d bytes: %.500q", all.Len()/2, length, raw)
	}
	return all.String(), nil
}

// writeDrive writes a byte again and again.
func writeDrive(c *chain, socket string, offset, length int64, b byte) error {
	raw, err := qemuIO(c, socket, fmt.Sprintf("write -P %d %d %d", b, offset, length))
	if err == nil && !bytes.Contains(raw, fmt.Appendf(nil, "wrote %d/%d bytes at offset %d", length, length, offset)) {
		err = fmt.Errorf("write to the drive: %.500q", raw)
	}
	return err
}

// qemuIO executes a command of qemu-io's on the only drive of the card and returns what it
// prints.
func qemuIO(c *chain, socket, command string) ([]byte, error) {
	var devices []object
	if err := qmp(socket, "qom-list", object{"path": "/machine/peripheral"}, &devices); err != nil {
		return nil, err
	}
	i := slices.IndexFunc(devices, func(d object) bool { return d["type"] == "child<nvme>" && d["name"] != "somebody" })
	if i < 0 {
		return nil, fmt.Errorf("the machine has no drive of the card")
	}
	output := c.path("log", "qemu.log")
	before, err := os.Stat(output)
	if err != nil {
		return nil, err
	}
	if err := qmp(socket, "human-monitor-command", object{"command-line": fmt.Sprintf("qemu-io -d /machine/peripheral/%s \"%s\"", devices[i]["name"], command)}, nil); err != nil {
		return nil, err
	}
	raw, err := os.ReadFile(output)
	if err != nil {
		return nil, err
	}
	return raw[before.Size():], nil
}
