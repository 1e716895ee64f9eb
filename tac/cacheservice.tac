"""Run it with: twistd -noy tac/cacheservice.tac --pidfile="""

import os
import sys

from twisted.application.service import Application
from twisted.internet import reactor
from twisted.logger import ILogObserver

from cacheservice import app
from cacheservice.base import clock
from cacheservice.ops.logs import TwistedEvents

# Twisted reads the wall clock; one that is set back an hour would hold every timer for that hour.
reactor.seconds = clock.seconds

settings = app.load_settings_or_exit(os.environ)
writer, threshold, log = app.make_log(settings, sys.argv)
application = Application("cacheservice")
application.setComponent(ILogObserver, TwistedEvents(log))
app.make_service(settings, reactor, writer, threshold, log).setServiceParent(application)
