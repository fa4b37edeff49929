package guest_test

import (
	"fmt"
	"net"
	"os/exec"
	"strings"
	"testing"

	"github.com/thaw-project/thaw/e2e/guest"
	"github.com/thaw-project/thaw/e2e/recipe"
)

// testCardConversion converts an image in the guest, through drives of the card: the store
// exports each block to the card, which shows it to the guest for as long as it is written.
// What comes out is what a conversion on the store's machine gives, and a converter that is
// killed leaves no drive.
func testCardConversion(t *testing.T, n *cardNode, box []byte) {
	store := n.store
	source, dest := store.registry.Ref("source", "through-card"), store.registry.Ref("converted", "through-card")
	if err := recipe.Push(t.Context(), containerImage(t, box, "through a card"), source); err != nil {
		t.Fatal(err)
	}
	disks := func() string {
		out, err := exec.CommandContext(t.Context(), n.card.program, "card", "disk", "list", "--config", n.config).CombinedOutput()
		if err != nil {
			t.Fatalf("thaw card disk list: %v: %s", err, out)
		}
		return string(out)
	}
	convert := fmt.Sprintf("thaw image convert --quiet --plain-http --virtual-size 1GiB --root /tmp/none --run /tmp/none --attacher %s --card %s --certificate /host/node/%s.crt --key /host/node/%[3]s.key --ca /host/ca.crt %s %s",
		net.JoinHostPort(store.address, "7443"), net.JoinHostPort(guest.HostAddress, n.attacherPort), nodeName, source, dest)
	t.Run("killed", func(t *testing.T) {
		n.do(t, fmt.Sprintf(`%s >/tmp/convert.log 2>&1 & pid=$!
			await 'ls -l /proc/$pid/fd | grep -q /dev/nvme || ! kill -0 $pid'
			kill -9 $pid || { cat /tmp/convert.log; exit 1; }`, convert))
		eventually(t, "the killed converter's drive is gone", func() error {
			if out := disks(); strings.Contains(out, "conversion") {
				return fmt.Errorf("the card shows\n%s", out)
			}
			return nil
		})
	})
	n.do(t, convert+" >/tmp/convert.log 2>&1 || { cat /tmp/convert.log; exit 1; }; grep -q written /tmp/convert.log")
	if out := disks(); strings.Contains(out, "conversion") {
		t.Errorf("after the conversion the card shows\n%s", out)
	}
	// The same blocks by name: what another conversion finds it does not write again.
	again, err := store.thaw.Convert(t.Context(), source, store.registry.Ref("converted", "not-through-card"), "overlayfs", "erofs", "--virtual-size", "1GiB")
	if err != nil {
		t.Fatal(err)
	}
	for i, l := range again.Images[0].Layers {
		if !l.Reused {
			t.Errorf("layer %d was not converted to the block of this name: %s", i, l.Block)
		}
	}
	n.do(t, fmt.Sprintf(`ctr images pull --plain-http --snapshotter thaw %[1]s >/tmp/pull.log 2>&1 || { cat /tmp/pull.log; exit 1; }
		: >/tmp/converted.log
		ctr run -d --snapshotter thaw --log-uri file:///tmp/converted.log %[1]s converted
		await '[ $(passes converted) -ge 1 ] || grep FAILED /tmp/converted.log' && ! grep FAILED /tmp/converted.log
		ctr task rm -f converted >/dev/null || true # says how it ended
		ctr container rm converted; ctr images rm --sync %[1]s`, dest))
}
